"""What a run wrote, made readable: records -> facts -> verdict, figures and tables -> one HTML page.

Nothing here imports JAX or touches a device: a report can be written on a laptop from a copied run directory.
"""
