"""What a process that sets its own title does to the environment the kernel shows of it."""

OVERWRITE_ENVIRONMENT = """
import ctypes
start, end = map(int, open('/proc/self/stat').read().rpartition(')')[2].split()[47:49])
ctypes.memset(start, 0, end - start)
ctypes.memset(start, 32, min(200, end - start - 1))
"""
