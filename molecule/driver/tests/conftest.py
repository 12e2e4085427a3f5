"""Has this directory on the path of its tests, which share hosts.py; the name molecule is the tool's."""
