"""`python -m wsss_hf COMMAND …`, and so `accelerate launch -m wsss_hf COMMAND …`."""

from .cli.main import main

if __name__ == "__main__":
    main()
