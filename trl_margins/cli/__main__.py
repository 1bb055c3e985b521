"""`accelerate launch -m trl_margins.cli train ...`"""

import sys

from . import main

sys.exit(main())
