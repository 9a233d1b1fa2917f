"""Makes everything that is made from code and records: results, README.md's tables, all keys.

python docs/pages.py            # writes what docs/ledger.py and docs/configuration.py make
python docs/pages.py --check    # names what is out of date, and exits with 1
"""

from __future__ import annotations

import sys

import configuration
import ledger

if __name__ == "__main__":
    sys.exit(max(made.main(sys.argv[1:]) for made in (ledger, configuration)))
