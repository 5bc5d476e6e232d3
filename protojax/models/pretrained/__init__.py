"""CLIP and SigLIP: image and text towers that compute what `transformers` computes from the same files.

`config` reads config.json, `networks` are the towers, `tensors` puts named tensors into their trees. Files are opened
by `protojax.towers`.
"""
