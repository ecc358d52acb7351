"""Robot episodes on disk: reads every known HDF5 layout, writes one, draws new ones. Needs numpy, h5py, Pillow."""
