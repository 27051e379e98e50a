"""Converters from the published PET/CT data sets to nnU-Net v2 raw datasets.

One data set, one module, one command (``autopet``, ``hecktor``, ``sts``, ``pclt20k``, with helpers named after them);
what they share is in rooms of its own: ``suv``, ``dicom_series``, ``dicom_seg``, ``rtstruct`` and ``nifti`` read,
``resampling`` and ``regions`` bring onto one grid; ``engine``, ``processes``, ``workspace``, ``raw_dataset``,
``splits`` and ``command`` run and write. Nothing here imports torch or nnU-Net, so that the commands answer at once and
run where only the data is.
"""
