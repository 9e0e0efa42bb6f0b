"""The drawings of docs/drawings: `PYTHONPATH=scripts python -m drawings` writes them."""
