"""Measuring generated images: features, moments and distances, class accuracy, nearest neighbours.

Nothing here is called FID: that is the distance in the Inception network's features, of 50,000 ImageNet samples.
"""
