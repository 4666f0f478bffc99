"""Files damaged, disks full, numbers that are none: F5, F6, F8, F9."""
