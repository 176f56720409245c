"""Sample a gallery of all classes, and of the same seeds under other settings: `python sample/gallery.py --help`."""

from sdt_diffusion.demo.gallery import main

if __name__ == "__main__":
    main()
