package core

// Version is the one version number of the library, the Python package and the `writer` key of files.
const Version = "0.1.0"

// Draft is the state of the file format until 1.0; a reader refuses any other. See FORMAT.md for its history.
const Draft = 3
