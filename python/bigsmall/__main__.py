"""python -m bigsmall"""

import sys

from bigsmall.cli import main

if __name__ == "__main__":
    sys.exit(main())
