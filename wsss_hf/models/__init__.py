"""Model code uploaded with every checkpoint. Flat files, relative imports only: `trust_remote_code` copies them.

Not uploaded: `background_threshold.py`, `checkpointing.py`, `libraries.py`, `mask_classifiers.py`, `pretrained.py`,
`registration.py`.
"""
