"""What every part of the package stands on: files, progress, interrupts, devices, arguments."""
