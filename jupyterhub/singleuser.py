"""A learner's JupyterLab in the workbook's environment: `python singleuser.py SITE_PACKAGES [option]…`.

Only what this environment lacks, the hub's own package, comes from SITE_PACKAGES, the room's environment. Kernels do
not see it: they start with a path of their own.
"""

import sys

sys.path.append(sys.argv.pop(1))

from jupyterhub.singleuser import main

main()
