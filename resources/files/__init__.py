"""Files that are read and written: derived tables, local files, the object store, and SQL views over them."""
