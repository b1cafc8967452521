"""Paper: recipes that rerun the tables of the paper, and the tables that come out."""
