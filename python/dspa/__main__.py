"""`python -m dspa` is `dspa`."""

from dspa.cli import main

if __name__ == "__main__":
    main()
