"""What would fail later, said before anything is changed: the inventory alone, each host, the hosts together."""
