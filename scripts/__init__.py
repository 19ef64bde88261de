"""What reproduces the paper and the tables of the documents; nothing imports it."""
