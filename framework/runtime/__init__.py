"""Device, number format, memory, random numbers, clock, shapes, and private names of torch."""
