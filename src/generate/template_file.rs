//! The template that training saved beside an adapter.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use super::Notice;
use super::error::TemplateError;
use crate::config::generate::GenerateOptions;
use crate::config::run::TemplateKind;
use crate::data::template::{TEMPLATE_FILE, Template, TemplateSettings};

const MAX_BYTES: u64 = 1 << 20;

/// How questions are put to a model, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asking {
    /// The template.
    pub settings: TemplateSettings,
    /// Whether training or the user named it; otherwise it is the model's own form.
    pub known: bool,
}

impl Asking {
    /// The template of the adapter (without one: of the model), unless the options name another
    /// kind; then a [`Notice`] tells of the difference.
    ///
    /// # Errors
    /// A template file that cannot be read.
    pub fn of(options: &GenerateOptions) -> Result<(Self, Option<Notice>), TemplateError> {
        let folder = options.adapter.as_ref().unwrap_or(&options.model);
        let saved = read_template(folder)?;
        let known = saved.is_some() || options.template.is_some();
        let saved_kind = saved.as_ref().map(|saved| kind(&saved.template));
        let mut settings = saved.unwrap_or_else(|| TemplateSettings {
            template: Template::PromptResponse(Default::default()),
            ..TemplateSettings::default()
        });
        let Some(asked) = options.template.filter(|asked| Some(*asked) != saved_kind) else {
            return Ok((Self { settings, known }, None));
        };
        settings.template = match asked {
            TemplateKind::Alpaca => Template::Alpaca(Default::default()),
            TemplateKind::PromptResponse => Template::PromptResponse(Default::default()),
            TemplateKind::PlainText => Template::PlainText(Default::default()),
            TemplateKind::Messages => Template::Messages(Default::default()),
            TemplateKind::ShareGpt => Template::ShareGpt(Default::default()),
        };
        let notice = saved_kind.map(|saved| Notice::OtherTemplate {
            saved: name(saved),
            asked: name(asked),
        });
        Ok((Self { settings, known }, notice))
    }
}

/// The settings in a folder's `template.toml`; `None` if there is no such file.
///
/// # Errors
/// A file that cannot be read, or is not what training writes.
pub fn read_template(folder: &Path) -> Result<Option<TemplateSettings>, TemplateError> {
    let path = folder.join(TEMPLATE_FILE);
    let content = |problem: String| TemplateError::Content {
        path: path.clone(),
        problem,
    };
    let mut text = String::new();
    let read =
        File::open(&path).and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text));
    match read {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TemplateError::Io { path, source }),
        Ok(bytes) if bytes as u64 > MAX_BYTES => {
            return Err(content(format!("longer than {MAX_BYTES} bytes")));
        }
        Ok(_) => {}
    }
    let settings = toml::from_str(&text);
    settings.map(Some).map_err(|error| {
        let before = error
            .span()
            .map_or("", |span| text.get(..span.start).unwrap_or(""));
        let line = 1 + before.matches('\n').count();
        content(format!("line {line}: {}", error.message()))
    })
}

/// The kind of a template.
pub fn kind(template: &Template) -> TemplateKind {
    match template {
        Template::Alpaca(_) => TemplateKind::Alpaca,
        Template::PromptResponse(_) => TemplateKind::PromptResponse,
        Template::PlainText(_) => TemplateKind::PlainText,
        Template::Messages(_) => TemplateKind::Messages,
        Template::ShareGpt(_) => TemplateKind::ShareGpt,
    }
}

/// The name of a kind, as in the file.
pub(super) fn name(kind: TemplateKind) -> &'static str {
    match kind {
        TemplateKind::Alpaca => "alpaca",
        TemplateKind::PromptResponse => "prompt_response",
        TemplateKind::PlainText => "plain_text",
        TemplateKind::Messages => "messages",
        TemplateKind::ShareGpt => "sharegpt",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::run::Device;
    use crate::data::template::{Alpaca, PlainText, PromptResponse};

    fn options(folder: &Path, template: Option<TemplateKind>) -> GenerateOptions {
        GenerateOptions {
            adapter: Some(folder.to_owned()),
            template,
            ..GenerateOptions::new("model".into(), vec![Device::Cpu])
        }
    }

    fn all() -> [Template; 3] {
        [
            Template::Alpaca(Alpaca {
                instruction: "q".to_owned(),
                ..Alpaca::default()
            }),
            Template::PromptResponse(PromptResponse {
                round_for_empty_history: true,
                ..PromptResponse::default()
            }),
            Template::PlainText(PlainText::default()),
        ]
    }

    #[test]
    fn what_was_saved_is_read_back_and_used() {
        let folder = tempfile::tempdir().unwrap();
        for template in all() {
            let saved = TemplateSettings {
                template,
                source_prefix: "背景：\n\"".to_owned(),
                parse_special: true,
                ..TemplateSettings::default()
            };
            let text = toml::to_string(&saved).unwrap();
            std::fs::write(folder.path().join(TEMPLATE_FILE), text).unwrap();
            assert_eq!(read_template(folder.path()).unwrap(), Some(saved.clone()));
            for asked in [None, Some(kind(&saved.template))] {
                let (asking, notice) = Asking::of(&options(folder.path(), asked)).unwrap();
                assert_eq!((&asking.settings, asking.known), (&saved, true));
                assert_eq!(notice, None);
            }
        }
        // The last one saved is plain text.
        let asked = Some(TemplateKind::Alpaca);
        let (asking, notice) = Asking::of(&options(folder.path(), asked)).unwrap();
        assert_eq!(
            asking.settings.template,
            Template::Alpaca(Alpaca::default())
        );
        assert_eq!(asking.settings.source_prefix, "背景：\n\"");
        let told = notice.unwrap().to_string();
        assert!(
            told.contains("plain_text") && told.contains("--template alpaca"),
            "{told}"
        );
    }

    #[test]
    fn without_a_file_it_is_the_models_own_form() {
        let folder = tempfile::tempdir().unwrap();
        let own = Template::PromptResponse(PromptResponse::default());
        let (asking, notice) = Asking::of(&options(folder.path(), None)).unwrap();
        assert_eq!(
            (asking.settings.template, asking.known, notice),
            (own, false, None)
        );
        let asked = Some(TemplateKind::Alpaca);
        let (asking, notice) = Asking::of(&options(folder.path(), asked)).unwrap();
        assert_eq!(
            (kind(&asking.settings.template), asking.known),
            (TemplateKind::Alpaca, true)
        );
        assert_eq!(notice, None);
    }

    #[test]
    fn a_damaged_file_is_named_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        for (text, words) in [
            (
                "source_prefix = \"\"\nsuorce = 1\n",
                "line 2: unknown field `suorce`",
            ),
            ("[template]\nkind = \"alpacca\"\n", "alpacca"),
            ("max_source_length = -1\n", "line 1: "),
            ("a", "line 1: "),
            ("\u{0}", "line 1: "),
        ] {
            std::fs::write(folder.path().join(TEMPLATE_FILE), text).unwrap();
            let told = read_template(folder.path()).unwrap_err().to_string();
            assert!(told.contains("template.toml: not a template: "), "{told}");
            assert!(told.contains(words), "{told}");
        }
        let long = "#".repeat(MAX_BYTES as usize + 1);
        std::fs::write(folder.path().join(TEMPLATE_FILE), long).unwrap();
        let told = read_template(folder.path()).unwrap_err().to_string();
        assert!(told.contains("longer than"), "{told}");
        std::fs::write(folder.path().join(TEMPLATE_FILE), [0xff]).unwrap();
        let told = read_template(folder.path()).unwrap_err().to_string();
        assert!(told.contains("UTF-8"), "{told}");
    }
}
