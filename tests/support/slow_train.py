"""The command line as on a machine of any speed: python tests/support/slow_train.py train WORDS

torchrun passes on the Ctrl-C that the terminal sent to its processes too; here that counts as the same
keystroke however late it comes.
"""

import sys

from difftrain import cli, runtime

runtime.ONE_KEYSTROKE = 1e9
sys.exit(cli.main(sys.argv[1:]))
