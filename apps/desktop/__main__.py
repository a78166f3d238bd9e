"""`python -m desktop`, and what Briefcase starts."""

from desktop.app import main

main()
