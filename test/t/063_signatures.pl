# Signatures of what is sent: what the branch signs, with which keys, and what the
# gateway takes.

use strict;
use warnings;

use Digest::SHA qw(hmac_sha256_base64);
use FindBin;
use lib "$FindBin::RealBin/../perl";

use IO::Compress::Gzip qw(gzip);
use MIME::Base64;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use SmReceiver;
use SmShop;
use Test::More;
use Time::HiRes qw(sleep time);

my $dir = PostgreSQL::Test::Utils::tempdir;
my $key_file = "$dir/branch.keys";
my $central_file = "$dir/central.keys";
my $token_file = "$dir/token";

# Bytes of keys; the first is the example of Standard Webhooks.
my @keys = (decode_base64('MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'), map { pack 'C*', map { ($_ * 7) % 256 } 1 .. $_ } 24, 64);

# A file in the place of another.
sub write_file
{
	my ($file, @lines) = @_;
	unlink "$file.new";
	append_to_file("$file.new", join('', map { "$_\n" } @lines));
	chmod 0600, "$file.new";
	rename "$file.new", $file or die $!;
	return;
}

sub line_of { return 'whsec_' . encode_base64($_[0], ''); }

sub signature
{
	my ($key, $id, $timestamp, $body) = @_;
	my $text = hmac_sha256_base64("$id.$timestamp.$body", $key);
	$text .= '=' while length($text) % 4;
	return "v1,$text";
}

# The example that Standard Webhooks gives: ours is the same HMAC.
is(signature($keys[0], 'msg_p5jXN8AQM9LWM0D4loKWxJek', 1614265330, '{"test": 2432232314}'), 'v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=', 'the known example');

# ---------------------------------------------------------------------------
# The gateway

my $node = start_central();
command_exit_is([ program(), '--signing-keys', "$dir/none", '--listen', '127.0.0.1:0' ], 1, 'no such file');
for my $bad ('', 'MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw', 'whsec_', 'whsec_????', 'whsec_' . encode_base64('short', ''), 'whsec_' . encode_base64('x' x 65, ''), join("\n", (line_of($keys[0])) x 9))
{
	write_file($central_file, $bad);
	command_exit_is([ program(), '--signing-keys', $central_file, '--listen', '127.0.0.1:0' ], 1, 'a file that holds no keys');
}
write_file($central_file, line_of($keys[0]), '', line_of($keys[2]));
my $gateway = start_gateway('--signing-keys', $central_file);

# A batch with a signature; headers replace those of it.
sub signed
{
	my ($key, $body, %headers) = @_;
	return post($gateway, $body, 'webhook-id' => 'm1', 'webhook-timestamp' => '1614265330', 'webhook-signature' => signature($key, 'm1', 1614265330, $body), %headers);
}
my $body = batch(event(1));
is_receipt(signed($keys[0], $body), 1, 0, 'a signed batch');
is_receipt(signed($keys[2], $body), 0, 1, 'with the other key');
is_problem(signed($keys[1], $body), 401, 'with a key that is not known', qr/does not fit/);
is_problem(post($gateway, $body), 401, 'without a signature', qr/are to be signed/);
is_problem(signed($keys[0], $body, "webhook-$_" => undef), 401, "without $_") for qw(id timestamp signature);
is_problem(signed($keys[0], $body, 'webhook-id' => 'm2'), 401, 'another id');
is_problem(signed($keys[0], $body, 'webhook-timestamp' => '1614265331'), 401, 'another time');
is_problem(signed($keys[0], "$body ", 'webhook-signature' => signature($keys[0], 'm1', 1614265330, $body)), 401, 'another body');
is_problem(signed($keys[0], $body, 'webhook-signature' => $_), 401, 'no signature: ' . substr($_, 0, 20))
  for '', 'v1,', 'v1', 'v1a,' . signature($keys[0], 'm1', 1614265330, $body), substr(signature($keys[0], 'm1', 1614265330, $body), 0, -1), 'v2' . substr(signature($keys[0], 'm1', 1614265330, $body), 2);
is_receipt(signed($keys[0], $body, 'webhook-signature' => join(' ', 'v1a,abc', signature($keys[1], 'm1', 1614265330, $body), signature($keys[0], 'm1', 1614265330, $body))), 0, 1, 'one of several that fits');
my $zipped;
gzip(\$body => \$zipped);
is_receipt(signed($keys[0], $zipped, 'content-encoding' => 'gzip'), 0, 1, 'a compressed body is signed as it is sent');
is_problem(signed($keys[0], $zipped, 'content-encoding' => 'gzip', 'webhook-signature' => signature($keys[0], 'm1', 1614265330, $body)), 401, 'not as it was before');
my @pieces = unpack '(a7)*', $body;
is_receipt(signed($keys[0], sub { shift @pieces }, 'webhook-signature' => signature($keys[0], 'm1', 1614265330, $body)), 0, 1, 'in chunks');
is_problem(request($gateway, 'POST', '/verify', '{"branch":"b1"}', 'content-type' => 'application/json'), 401, 'a question without one');
is(request($gateway, 'GET', '/health')->{status}, 200, 'health needs none');
is_problem(signed($keys[0], $body, authorization => 'Bearer wrong'), 401, 'a signature is no token', qr/token/);
is(received('true'), '1', 'nothing else is stored');
# Keys change while it runs.
write_file($central_file, line_of($keys[1]));
is_receipt(signed($keys[1], $body), 0, 1, 'a key that is new in the file');
is_problem(signed($keys[0], $body), 401, 'one that is gone');
unlink $central_file;
is_problem(signed($keys[1], $body), 503, 'no file: later, perhaps');

# ---------------------------------------------------------------------------
# The branch

write_file($central_file, line_of($keys[0]));
write_file($token_file, $node->safe_psql('postgres', q{SELECT softmobile.central_create_token('{1,2}', 'shop')}));
my $receiver = SmReceiver->new;
my $shop = SmShop->new(
	url      => "http://127.0.0.1:$gateway->{port}",
	branches => ['1'],
	conf     => "softmobile.auth_token_file = '$token_file'\nsoftmobile.retry_interval = 1s\nsoftmobile.compression = none\n");
$shop->sell('1', 'S-1');
$shop->fails_with(qr/^http 401: Bodies are to be signed/, 'a branch without keys');
write_file($key_file, line_of($keys[0]));
$shop->sql("ALTER SYSTEM SET softmobile.signing_key_file = '$key_file'");
$shop->sql('SELECT pg_reload_conf()');
$shop->drains('it goes on as soon as it has some');
is($shop->sql(q{SELECT string_agg(DISTINCT equal::text, ' ') FROM softmobile.verify_delivery('1')}), 'true', 'what it asks is signed, too');

# Without a gap: central learns the new key, the branch signs with both, then with the new one, central forgets the old one.
write_file($central_file, line_of($keys[1]), line_of($keys[0]));
$shop->sell('1', 'S-2');
$shop->drains('central knows both');
write_file($key_file, line_of($keys[1]), line_of($keys[0]));
$shop->sell('1', 'S-3');
$shop->drains('the branch signs with both');
write_file($central_file, line_of($keys[1]));
$shop->sell('1', 'S-4');
$shop->drains('central knows the new one');
write_file($key_file, line_of($keys[1]));
$shop->sell('1', 'S-5');
$shop->drains('the branch signs with the new one');
is($shop->sql(q{SELECT count(*) FROM softmobile.outbox_batch WHERE attempt_count > 1}), '1', 'and no batch but the first had to be sent twice');
for my $case ([ 'whsec_short' => 'a line of the file is not whsec_ and 24 to 64 bytes in base64' ], [ '' => 'the file is empty' ], [ join("\n", (line_of($keys[0])) x 9) => 'the file holds more than 8 keys' ])
{
	write_file($key_file, $case->[0]);
	$shop->sell('1', 'bad-' . length $case->[0]);
	$shop->comes_to(q{SELECT DISTINCT error_message FROM softmobile.sync_outbox WHERE status = 'FAILED'}, "signing key: $case->[1]", 'a file that is wrong');
}
write_file($key_file, line_of($keys[1]));
$shop->drains('and right again');

# What another receiver sees.
write_file($key_file, line_of($keys[0]), line_of($keys[2]));
$shop->sql("SELECT softmobile.register_branch('2', 'Norte', '" . $receiver->url . "')");
$receiver->answer('status', status => 503);
$shop->sell('2', 'N-1');
$shop->fails_with(qr/^http 503/, 'another receiver', '2');
$receiver->answer('receipt');
$shop->drains('takes it the second time', '2');
my @seen = $receiver->batches;
cmp_ok(scalar(@seen), '>', 1, 'it was sent more than once');
is_deeply([ map { $_->{headers}{'webhook-id'} } @seen ], [ ($seen[0]{headers}{'webhook-id'}) x @seen ], 'with one id');
is('"' . $seen[0]{headers}{'webhook-id'} . '"', $seen[0]{headers}{'idempotency-key'}, 'that of the batch');
cmp_ok(abs($_->{headers}{'webhook-timestamp'} - time), '<', 120, 'the time is that of the attempt') for $seen[0];
is($seen[-1]{headers}{'webhook-signature'}, join(' ', map { signature($_, @{ $seen[-1]{headers} }{qw(webhook-id webhook-timestamp)}, $seen[-1]{body}) } @keys[ 0, 2 ]), 'signatures of all keys, in their order');
is_deeply([ grep { /whsec|MfKQ9r8G/ } split /\n/, slurp_file($shop->node->logfile) ], [], 'no key in the log');
$shop->stop;
is(stop_gateway($gateway), 0, 'the gateway ends');
unlike(slurp_file(log_file()), qr/whsec|MfKQ9r8G/, 'nor in the gateway\'s');
done_testing();
