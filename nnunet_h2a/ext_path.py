"""``python -m nnunet_h2a.ext_path`` prints the folder to put into ``nnUNet_extTrainer`` by hand."""

from nnunet_h2a._autoreg import shim_folder

if __name__ == "__main__":
    print(shim_folder())
