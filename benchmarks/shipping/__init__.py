"""The parts of `ship_cifar10.py`: what is kept, how children are watched, how the rest of a run is planned."""
