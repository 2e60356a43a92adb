"""The stages of a GPU session. Each gives a record for the results file, whatever happens in it."""
