"""What runs dense nets, one file each."""
