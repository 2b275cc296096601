"""What a computation runs on: device, precision, memory, random numbers, clock, shapes."""
