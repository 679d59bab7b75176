//! Object stores: S3 and what is compatible with it, Google Cloud Storage, Azure Blob Storage; the door to their clients.

use std::sync::Arc;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{HttpClient, HttpConnector};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as ObjectPath;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use reqwest::Client;

use super::policy::{Policy, describe};
use super::transfer::Origin;
use lineside_api::kinds::{ObjectAddress, Provider};
use lineside_common::error_chain;
use lineside_common::secrets::{Secret, SecretError};

/// Hands out our own client, so that the policy on addresses holds here too.
#[derive(Debug, Clone)]
struct Ours(Client);

impl HttpConnector for Ours {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.0.clone()))
    }
}

/// Where an object can be had.
pub(super) fn origin(
    client: &Client,
    policy: &Policy,
    address: &ObjectAddress,
    secret: &Secret,
) -> Result<Origin, String> {
    if let Some(endpoint) = &address.endpoint {
        policy.check(endpoint)?;
    }
    let endpoint = address.endpoint.as_ref().map(|url| url.as_str().trim_end_matches('/').to_owned());
    let connector = Ours(client.clone());
    // Attempts are counted and spaced in one place, which is not this crate.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let store: object_store::Result<Arc<dyn ObjectStore>> = match address.provider {
        Provider::S3 => {
            let mut builder = AmazonS3Builder::new()
                .with_bucket_name(&address.bucket)
                .with_region(address.region.as_deref().unwrap_or("us-east-1"))
                .with_allow_http(policy.allow_http)
                .with_retry(retry)
                .with_http_connector(connector);
            if let Some(endpoint) = endpoint {
                builder = builder.with_endpoint(endpoint);
            }
            builder = match secret.is_named() {
                true => builder
                    .with_access_key_id(secret.require("accessKeyId").map_err(text)?)
                    .with_secret_access_key(secret.require("secretAccessKey").map_err(text)?),
                false => builder.with_skip_signature(true),
            };
            if let Some(token) = secret.get("sessionToken").map_err(text)? {
                builder = builder.with_token(token);
            }
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
        Provider::Gcs => {
            let mut builder = GoogleCloudStorageBuilder::new()
                .with_bucket_name(&address.bucket)
                .with_client_options(ClientOptions::new().with_allow_http(policy.allow_http))
                .with_retry(retry)
                .with_http_connector(connector);
            if let Some(endpoint) = endpoint {
                builder = builder.with_base_url(&endpoint);
            }
            builder = match secret.is_named() {
                true => builder.with_service_account_key(secret.require("serviceAccount.json").map_err(text)?),
                false => builder.with_skip_signature(true),
            };
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
        Provider::Azure => {
            let mut builder = MicrosoftAzureBuilder::new()
                .with_account(address.account.clone().unwrap_or_default())
                .with_container_name(&address.bucket)
                .with_allow_http(policy.allow_http)
                .with_retry(retry)
                .with_http_connector(connector);
            if let Some(endpoint) = endpoint {
                builder = builder.with_endpoint(endpoint);
            }
            builder = match (secret.get("accessKey").map_err(text)?, secret.get("sasToken").map_err(text)?) {
                (Some(key), _) => builder.with_access_key(key),
                (None, Some(token)) => builder.with_sas_authorization(sas_pairs(&token)),
                (None, None) if secret.is_named() => {
                    return Err(text(secret.missing("accessKey")));
                }
                (None, None) => builder.with_skip_signature(true),
            };
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
    };
    let store = store.map_err(|error| describe(&error))?;
    let key = ObjectPath::parse(&address.key).map_err(|error| error.to_string())?;
    Ok(Origin::Object { store, key })
}

fn text(error: SecretError) -> String {
    error_chain(&error)
}

/// `?sv=...&sig=...` as pairs; escapes are resolved, since they are written anew.
fn sas_pairs(token: &str) -> Vec<(String, String)> {
    let query = format!("https://x/?{}", token.trim_start_matches('?'));
    reqwest::Url::parse(&query).map(|url| url.query_pairs().into_owned().collect()).unwrap_or_default()
}
