"""The contract between export and runtime: errors, manifest, atomic writes. Needs numpy and msgspec only."""
