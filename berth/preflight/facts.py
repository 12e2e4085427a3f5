"""What a host said of itself (library/preflight_facts.py), what is asked of it, and what is expected. Memory in MiB."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OsRelease:
    """``ID``, ``VERSION_ID`` and ``PRETTY_NAME`` of os-release(5)."""

    id: str = ""
    version: str = ""
    name: str = ""


@dataclass(frozen=True)
class Interpreter:
    """A Python on the host: its version, "" with the reason in ``error`` when it does not run."""

    version: str
    venv: bool
    error: str = ""

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True)
class FileSystem:
    """Where a path is, or will be. ``inodes`` is 0 on file systems without a fixed number of them."""

    at: str = ""
    mount: str = ""
    type: str = ""
    options: tuple[str, ...] = ()
    total_mib: int = 0
    free_mib: int = 0
    inodes: int = 0
    inodes_free: int = 0
    error: str = ""


@dataclass(frozen=True)
class Address:
    """A node address as the host itself resolves it: ``here`` when it is one of its own."""

    ip: str
    here: bool
    interface: str = ""
    mtu: int | None = None


@dataclass(frozen=True)
class Probe:
    """One TCP connection to a peer: open, refused (both are answers), timeout, unreachable, unresolved.

    ``mtu`` is what the kernel knows of the path's MTU.
    """

    host: str
    address: str
    port: int
    state: str
    mtu: int | None = None

    @property
    def answered(self) -> bool:
        return self.state in ("open", "refused")


@dataclass(frozen=True)
class Listener:
    """Who listens on a port; all None when the kernel does not tell us. ``cluster`` is Berth's mark on the process."""

    port: int
    pid: int | None = None
    command: str | None = None
    cluster: str | None = None


@dataclass(frozen=True)
class NvidiaGpu:
    uuid: str
    product: str


@dataclass(frozen=True)
class Nvidia:
    """The loaded driver ("" for none) and its GPUs as /proc shows them; ``on_pci`` counts cards on the bus."""

    driver: str = ""
    gpus: tuple[NvidiaGpu, ...] = ()
    on_pci: int = 0


@dataclass(frozen=True)
class HostFacts:
    """Everything that library/preflight_facts.py reads. Times in seconds since the epoch, by the host's clock."""

    system: str
    hostname: str
    kernel: str
    architecture: str
    os: OsRelease
    python: str
    euid: int
    memory_mib: int
    nofile_hard: int
    nr_open: int
    time_start: float
    time_end: float
    machine_id: str = ""
    clock_synchronised: bool | None = None
    time_daemons: tuple[str, ...] = ()
    interpreters: dict[str, Interpreter] = field(default_factory=dict)
    commands: dict[str, bool] = field(default_factory=dict)
    exists: dict[str, bool] = field(default_factory=dict)
    sha1: dict[str, str] = field(default_factory=dict)
    filesystems: dict[str, FileSystem] = field(default_factory=dict)
    addresses: dict[str, Address] = field(default_factory=dict)
    peers: tuple[Probe, ...] = ()
    listeners: tuple[Listener, ...] = ()
    nvidia: Nvidia = Nvidia()


@dataclass(frozen=True)
class Answer:
    """What came back from a host: its facts, or in ``failed`` why there are none.

    ``before`` and ``after`` are the controller's clock around the call, in seconds since the epoch. ``os`` is what a
    plain shell said where no module could run.
    """

    facts: HostFacts | None = None
    failed: str = ""
    before: float = 0.0
    after: float = 0.0
    os: OsRelease = OsRelease()


@dataclass(frozen=True)
class Peer:
    """Another host of the cluster to connect to."""

    host: str
    address: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """What a host is asked to look at; the options of library/preflight_facts.py."""

    paths: tuple[str, ...] = ()
    exists: tuple[str, ...] = ()
    sha1: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    interpreters: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    ports: tuple[int, ...] = ()


@dataclass(frozen=True)
class Expectation:
    """What the inventory wants of one host; fields are called after the variables they come from."""

    host: str
    slot_host: str
    head: bool
    slots: bool
    cluster: str
    state_dir: str
    run_dir: str
    cache_dir: str
    systemd: bool
    simulate: str
    runtime: str
    """The link to the runtime in use: where it is there, the disk was large enough already."""
    agent_python: str
    runtime_python: str
    disk_mib: int
    inodes: int
    nofile: int
    clock_offset_s: float
    slot_memory_mib: int
    slot_object_store_mib: int
    head_memory_mib: int
    shapes: tuple[int, ...] = ()
    """GPUs of each group that forms one slot."""
    named_gpus: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """UUIDs that the inventory names for this host, by variable."""
    ports: dict[str, int] = field(default_factory=dict)
