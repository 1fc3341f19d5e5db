"""The commands of the command line, one file each. PyTorch takes two seconds, so each is imported when it is called."""
