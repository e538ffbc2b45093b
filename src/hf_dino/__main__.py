"""Run the command line as `python -m hf_dino`, which `accelerate launch -m hf_dino` starts on several processes."""

from .cli import main


if __name__ == "__main__":
    main()
