"""Models as people have them: a module or folder for each library."""
