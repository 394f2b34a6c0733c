//! PyTorch files as this program writes them. That PyTorch loads them is shown by tests/interop.

use std::fs::File;
use std::io::Read;

use mp_train::checkpoint::torch_zip::write_torch;
use mp_train::checkpoint::{Dtype, HostTensor, open_tensor_file, read_all};
use zip::{CompressionMethod, ZipArchive};

use super::tiny::Tensors;

fn all_types() -> Tensors {
    let types = [
        Dtype::F16,
        Dtype::Bf16,
        Dtype::F32,
        Dtype::F64,
        Dtype::I8,
        Dtype::U8,
        Dtype::I16,
        Dtype::I32,
        Dtype::I64,
        Dtype::Bool,
    ];
    let mut tensors = Tensors::new();
    for dtype in types {
        for shape in [vec![], vec![5], vec![3, 7], vec![2, 1, 3]] {
            let count: usize = shape.iter().product::<usize>() * dtype.size();
            let bytes = (0..count).map(|i| match dtype {
                Dtype::Bool => (i % 2) as u8,
                // Neither infinities nor NaNs, whatever the type.
                _ => ((i * 37) % 60) as u8,
            });
            let tensor = HostTensor::new(dtype, shape.clone(), bytes.collect()).unwrap();
            tensors.insert(format!("{dtype}.{shape:?}"), tensor);
        }
    }
    tensors.insert("leer/空".into(), HostTensor::from_f32([0, 4], &[]).unwrap());
    tensors
}

#[test]
fn every_type_and_shape_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pytorch_model.bin");
    let tensors = all_types();
    write_torch(&path, &tensors).unwrap();
    let read = read_all(open_tensor_file(&path).unwrap().as_ref()).unwrap();
    assert!(read.keys().eq(tensors.keys()));
    for (name, tensor) in &tensors {
        assert!(read[name] == *tensor, "{name}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn the_archive_is_laid_out_as_torch_save_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pytorch_model.bin");
    let tensors = all_types();
    write_torch(&path, &tensors).unwrap();
    let mut archive = ZipArchive::new(File::open(&path).unwrap()).unwrap();
    assert_eq!(archive.len(), tensors.len() + 3);
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).unwrap();
        assert_eq!(entry.compression(), CompressionMethod::Stored);
        let name = entry.name().unwrap().into_owned();
        let start = entry.data_start().unwrap();
        assert_eq!(start % 64, 0, "{name}");
        let mut bytes = Vec::new();
        // To the end, where the checksum is compared.
        entry.read_to_end(&mut bytes).unwrap();
        match name.strip_prefix("pytorch_model/").unwrap() {
            "version" => assert_eq!(bytes, b"3\n"),
            "byteorder" => assert_eq!(bytes, b"little"),
            "data.pkl" => assert_eq!(bytes[..2], [0x80, 2]),
            storage => {
                let key: usize = storage.strip_prefix("data/").unwrap().parse().unwrap();
                let (_, tensor) = tensors.iter().nth(key).unwrap();
                assert_eq!(bytes, tensor.bytes);
            }
        }
    }
}

#[test]
fn bad_tensors_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pytorch_model.bin");
    let one = HostTensor::from_f32([1], &[1.0]).unwrap();
    let error = write_torch(&path, [("a", &one), ("a", &one)]).unwrap_err();
    assert!(error.to_string().contains("twice"), "{error}");
    let short = HostTensor {
        shape: vec![2],
        ..one.clone()
    };
    let error = write_torch(&path, [("a", &short)]).unwrap_err();
    assert!(error.to_string().contains("'a'"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
