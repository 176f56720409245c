"""Write a model card and push a model to the Hub: `python train/share.py --help`."""

from sdt_diffusion.hub.push import main

if __name__ == "__main__":
    main()
