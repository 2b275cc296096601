"""The built-in parts, by kind. Your own files in this folder are found, too."""
