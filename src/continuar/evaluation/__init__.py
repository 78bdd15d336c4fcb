"""Measuring generated images. docs/evaluation.md says how, and what may be called what.

* Features: `networks` is the closed table of feature networks, `features` SqueezeNet, `inception` that of
  FID and sFID, and `classifier` a small one of ours.
* Scores of features: `moments` (Frechet distance), `inception_score`, `kernel_distance`, `precision_recall`, `neighbours`; `scores`
  puts them together. `reconstruction` is for tokenizers.
* Images and references: `images` reads them block by block, `reference` keeps statistics in ADM's npz layout.
* Runs: `samples` are generated or given, `shards` survive a kill, `processes` share the work, `run` is one evaluation and `report`
  its result; `axes`, `sweep`, `tables` and `plots` are many.

FID is the distance in the FID Inception network's features, and nothing else is called that.
"""
