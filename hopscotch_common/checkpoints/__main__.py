"""`python -m hopscotch_common.checkpoints verify FOLDER`"""

import sys

from hopscotch_common.checkpoints.verify import main

if __name__ == "__main__":
    sys.exit(main())
