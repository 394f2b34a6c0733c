#![no_main]

use libfuzzer_sys::fuzz_target;
use readers::checkpoint::open_tensor_file;

mod scratch;

fuzz_target!(|bytes: &[u8]| {
    let path = scratch::write("pytorch_model.bin", bytes);
    let Ok(file) = open_tensor_file(&path) else {
        return;
    };
    for name in file.names() {
        // One goes through the crate, the other to the place in the file.
        let (Ok(read), Ok(open)) = (file.read(&name), file.open(&name)) else {
            continue;
        };
        assert_eq!((read.dtype, &read.shape[..]), (open.dtype(), open.shape()));
        let mut values = vec![0.0; open.element_count()];
        if open.read_f32(0, &mut values).is_ok() {
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&read.to_f32().unwrap()), bits(&values), "{name}");
        }
    }
});
