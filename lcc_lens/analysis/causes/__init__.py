"""Why a head lost: what its changed input, its own attention pattern and its own values contribute."""
