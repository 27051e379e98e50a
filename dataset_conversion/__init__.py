"""Converters from the published PET/CT data sets to nnU-Net v2 raw datasets.

One data set, one module, one command (``sts``, ``autopet``); what they share is in rooms of its own (``suv``,
``dicom_series``, ``rtstruct``, ``resampling``, ``engine``, ``raw_dataset``, ``command``). Nothing here imports torch or
nnU-Net, so that the commands answer at once and run where only the data is.
"""
