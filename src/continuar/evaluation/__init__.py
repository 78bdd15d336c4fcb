"""Scores of generated images; docs/evaluation.md explains how they are measured and what they may be called.

* `networks`: the closed table of feature networks. `metrics`: the scores of features.
* `samples`: images on disk and generated ones. `reference`: statistics of real images in ADM's npz layout.
* `run`: one evaluation, sharded and resumable. `sweep`: many, with tables and plots. `reconstruction`: scores of tokenizers.
"""
