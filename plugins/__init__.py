"""The parts that come with the framework, by kind. A file of yours in this folder is found, too."""
