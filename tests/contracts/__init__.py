"""Contract tests: the undocumented parts of libraries that ccm uses, one file for each library.

After an upgrade that changes one of them, its test fails first and names the code of ccm that uses it. Behaviour that a
library documents is not tested here.
"""
