"""Side-by-side measurements against torch; `python -m bench --help`."""
