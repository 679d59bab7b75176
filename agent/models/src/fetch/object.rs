//! Object stores: S3 and compatible stores, Google Cloud Storage, and Azure Blob Storage.

use std::sync::Arc;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{HttpClient, HttpConnector};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as ObjectPath;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use reqwest::Client;

use lineside_api::kinds::{ObjectAddress, Provider};
use lineside_common::secrets::Secret;

use super::error::{FetchErrorKind, TransferError};
use super::policy::AddressPolicy;
use super::transfer::Origin;

/// Gives the object stores the client of the address policy, so that the policy also holds for them.
#[derive(Debug, Clone)]
struct PolicyConnector(Client);

impl HttpConnector for PolicyConnector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.0.clone()))
    }
}

/// What the clients of all providers have in common.
struct ClientSettings {
    endpoint: Option<String>,
    allow_http: bool,
    connector: PolicyConnector,
    retry: RetryConfig,
}

/// The origin of an object.
pub(super) fn origin(
    client: &Client,
    policy: &AddressPolicy,
    address: &ObjectAddress,
    secret: &Secret,
) -> Result<Origin, TransferError> {
    if let Some(endpoint) = &address.endpoint {
        policy.check(endpoint)?;
    }
    let settings = ClientSettings {
        endpoint: address.endpoint.as_ref().map(|url| url.as_str().trim_end_matches('/').to_owned()),
        allow_http: policy.allow_http,
        connector: PolicyConnector(client.clone()),
        // The transfer retries, so that attempts are counted and spaced in one place.
        retry: RetryConfig { max_retries: 0, ..RetryConfig::default() },
    };
    let store = match address.provider {
        Provider::S3 => s3(address, secret, settings)?,
        Provider::Gcs => gcs(address, secret, settings)?,
        Provider::Azure => azure(address, secret, settings)?,
    };
    let key = ObjectPath::parse(&address.key).map_err(configuration)?;
    Ok(Origin::Object { store, key })
}

fn s3(
    address: &ObjectAddress,
    secret: &Secret,
    settings: ClientSettings,
) -> Result<Arc<dyn ObjectStore>, TransferError> {
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(&address.bucket)
        .with_region(address.region.as_deref().unwrap_or("us-east-1"))
        .with_allow_http(settings.allow_http)
        .with_retry(settings.retry)
        .with_http_connector(settings.connector);
    if let Some(endpoint) = settings.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    builder = if secret.is_named() {
        builder
            .with_access_key_id(secret.require("accessKeyId").map_err(TransferError::secret)?)
            .with_secret_access_key(secret.require("secretAccessKey").map_err(TransferError::secret)?)
    } else {
        builder.with_skip_signature(true)
    };
    if let Some(token) = secret.get("sessionToken").map_err(TransferError::secret)? {
        builder = builder.with_token(token);
    }
    Ok(Arc::new(builder.build().map_err(configuration)?))
}

fn gcs(
    address: &ObjectAddress,
    secret: &Secret,
    settings: ClientSettings,
) -> Result<Arc<dyn ObjectStore>, TransferError> {
    let mut builder = GoogleCloudStorageBuilder::new()
        .with_bucket_name(&address.bucket)
        .with_client_options(ClientOptions::new().with_allow_http(settings.allow_http))
        .with_retry(settings.retry)
        .with_http_connector(settings.connector);
    if let Some(endpoint) = settings.endpoint {
        builder = builder.with_base_url(&endpoint);
    }
    builder = if secret.is_named() {
        let key = secret.require("serviceAccount.json").map_err(TransferError::secret)?;
        builder.with_service_account_key(key)
    } else {
        builder.with_skip_signature(true)
    };
    Ok(Arc::new(builder.build().map_err(configuration)?))
}

fn azure(
    address: &ObjectAddress,
    secret: &Secret,
    settings: ClientSettings,
) -> Result<Arc<dyn ObjectStore>, TransferError> {
    let mut builder = MicrosoftAzureBuilder::new()
        .with_account(address.account.clone().unwrap_or_default())
        .with_container_name(&address.bucket)
        .with_allow_http(settings.allow_http)
        .with_retry(settings.retry)
        .with_http_connector(settings.connector);
    if let Some(endpoint) = settings.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    let sas_token = secret.get("sasToken").map_err(TransferError::secret)?;
    builder = match (secret.get("accessKey").map_err(TransferError::secret)?, sas_token) {
        (Some(key), _) => builder.with_access_key(key),
        (None, Some(token)) => builder.with_sas_authorization(sas_pairs(&token)),
        (None, None) if secret.is_named() => {
            builder.with_access_key(secret.require("accessKey").map_err(TransferError::secret)?)
        }
        (None, None) => builder.with_skip_signature(true),
    };
    Ok(Arc::new(builder.build().map_err(configuration)?))
}

fn configuration(error: impl std::error::Error + Send + Sync + 'static) -> TransferError {
    let message = "the address or the credentials of the object store are not valid";
    TransferError::permanent(FetchErrorKind::Configuration, message).caused_by(error)
}

/// Splits `?sv=...&sig=...` into pairs. Escapes are resolved, because the client escapes the pairs again.
fn sas_pairs(token: &str) -> Vec<(String, String)> {
    let query = format!("https://x/?{}", token.trim_start_matches('?'));
    reqwest::Url::parse(&query).map(|url| url.query_pairs().into_owned().collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sas_token_is_split_and_unescaped() {
        let expected = [("sv", "2024-01-01"), ("sig", "a+b=")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(sas_pairs("?sv=2024-01-01&sig=a%2Bb%3D"), expected);
        assert_eq!(sas_pairs("sv=2024-01-01&sig=a%2Bb%3D"), expected);
    }
}
