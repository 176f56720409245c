"""Look at what a pipeline makes: the page of `sdt-diffusion demo`, and the gallery of `sample/gallery.py`."""
