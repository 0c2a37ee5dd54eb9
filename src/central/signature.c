/*
 * signature.c
 *		Signatures of bodies, as Standard Webhooks has them (--signing-keys).
 *
 * HMAC-SHA256 over "<webhook-id>.<webhook-timestamp>.<body>", the body as it was sent,
 * computed while it comes in, with each key of the file.  The file is read for each request:
 * it is small, and keys change without a restart.  A signature says that nobody has changed the
 * body on its way; how old it is does not matter, because a batch that comes again has no effect.
 *
 * A Signature belongs to the thread that serves its connection.
 */
#include "gateway.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/crypto.h>
#include <openssl/evp.h>

#define KEY_PREFIX		"whsec_"
#define KEY_MIN			24
#define KEY_MAX			64
#define MAX_KEYS		8
#define DIGEST_LEN		32
#define DIGEST_TEXT_LEN	44		/* in base64 */

struct Signature
{
	int			nkeys;
	EVP_MD_CTX *mac[MAX_KEYS];
	char	   *given;			/* value of the header */
};

static const Options *options = NULL;

/* A key in the form of the file; NULL: it is none. */
static EVP_PKEY *
decode_key(const char *line)
{
	const char *text = line + strlen(KEY_PREFIX);
	unsigned char key[(KEY_MAX + 2) / 3 * 3 + 3];
	EVP_PKEY   *result = NULL;
	size_t		len;
	int			n;

	if (strncmp(line, KEY_PREFIX, strlen(KEY_PREFIX)) != 0)
		return NULL;
	len = strlen(text);
	if (len % 4 != 0 || len > sizeof(key) / 3 * 4)
		return NULL;
	n = EVP_DecodeBlock(key, (const unsigned char *) text, (int) len);
	/* it counts the padding */
	if (n > 0 && text[len - 1] == '=')
		n -= text[len - 2] == '=' ? 2 : 1;
	if (n >= KEY_MIN && n <= KEY_MAX)
		result = EVP_PKEY_new_raw_private_key(EVP_PKEY_HMAC, NULL, key, (size_t) n);
	OPENSSL_cleanse(key, sizeof(key));
	return result;
}

/* Reads the keys; -1: the file cannot be used, and the log says why. */
static int
read_keys(EVP_PKEY *keys[MAX_KEYS])
{
	FILE	   *file = fopen(options->signing_keys, "re");
	char		line[256];
	const char *problem = file == NULL ? "it cannot be read" : NULL;
	int			n = 0;

	while (problem == NULL && fgets(line, sizeof(line), file) != NULL)
	{
		line[strcspn(line, " \t\r\n")] = '\0';
		if (line[0] == '\0')
			continue;
		if (n == MAX_KEYS)
			problem = "it holds more than 8 keys";
		else if ((keys[n] = decode_key(line)) == NULL)
			problem = "a line is not whsec_ and 24 to 64 bytes in base64";
		else
			n++;
	}
	OPENSSL_cleanse(line, sizeof(line));
	if (file != NULL)
		fclose(file);
	if (problem == NULL && n == 0)
		problem = "it holds no key";
	if (problem == NULL)
		return n;
	log_line("file of --signing-keys: %s", problem);
	while (n > 0)
		EVP_PKEY_free(keys[--n]);
	return -1;
}

bool
signature_init(const Options *opts)
{
	EVP_PKEY   *keys[MAX_KEYS];
	int			n;

	options = opts;
	if (opts->signing_keys == NULL)
		return true;
	n = read_keys(keys);
	for (int i = 0; i < n; i++)
		EVP_PKEY_free(keys[i]);
	return n > 0;
}

/* NULL: no memory, or no keys. */
Signature *
signature_begin(const char *id, const char *timestamp, const char *given)
{
	EVP_PKEY   *keys[MAX_KEYS];
	Signature  *signature = calloc(1, sizeof(Signature));
	int			n = signature != NULL ? read_keys(keys) : -1;
	bool		good = n > 0 && (signature->given = strdup(given)) != NULL;

	for (int i = 0; i < n; i++)
	{
		EVP_MD_CTX *mac = EVP_MD_CTX_new();

		good = good && mac != NULL &&
			EVP_DigestSignInit(mac, NULL, EVP_sha256(), NULL, keys[i]) == 1 &&
			EVP_DigestSignUpdate(mac, id, strlen(id)) == 1 &&
			EVP_DigestSignUpdate(mac, ".", 1) == 1 &&
			EVP_DigestSignUpdate(mac, timestamp, strlen(timestamp)) == 1 &&
			EVP_DigestSignUpdate(mac, ".", 1) == 1;
		EVP_PKEY_free(keys[i]);
		signature->mac[signature->nkeys++] = mac;
	}
	if (good)
		return signature;
	signature_free(signature);
	return NULL;
}

void
signature_take(Signature *signature, const char *data, size_t size)
{
	for (int i = 0; signature != NULL && i < signature->nkeys; i++)
		(void) EVP_DigestSignUpdate(signature->mac[i], data, size);
}

/* Does one of the header's signatures, "v1,<base64> v1,...", fit one of the keys? */
bool
signature_fits(Signature *signature)
{
	bool		fits = false;

	for (int i = 0; i < signature->nkeys; i++)
	{
		unsigned char digest[DIGEST_LEN];
		unsigned char text[DIGEST_TEXT_LEN + 1];
		size_t		len = sizeof(digest);

		if (EVP_DigestSignFinal(signature->mac[i], digest, &len) != 1 || len != sizeof(digest))
			continue;
		(void) EVP_EncodeBlock(text, digest, (int) len);
		for (const char *one = signature->given; *one != '\0'; one += strspn(one, " "))
		{
			size_t		one_len = strcspn(one, " ");

			if (one_len == 3 + DIGEST_TEXT_LEN && strncmp(one, "v1,", 3) == 0 &&
				CRYPTO_memcmp(one + 3, text, DIGEST_TEXT_LEN) == 0)
				fits = true;
			one += one_len;
		}
	}
	return fits;
}

void
signature_free(Signature *signature)
{
	if (signature == NULL)
		return;
	for (int i = 0; i < signature->nkeys; i++)
		EVP_MD_CTX_free(signature->mac[i]);
	free(signature->given);
	free(signature);
}
