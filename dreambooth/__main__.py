"""`python -m dreambooth COMMAND ...`, as the console command."""

import sys

from dreambooth.command import main

if __name__ == "__main__":
    sys.exit(main())
