# A connection of HTTP::Daemon's, spoken to through TLS.
package SmReceiver::Tls;

use strict;
use warnings;

use HTTP::Daemon;
use IO::Socket::SSL;

our @ISA = ('IO::Socket::SSL', 'HTTP::Daemon::ClientConn');

# Returns the connection after the handshake, nothing if that failed.
sub start
{
	my ($connection, $tls) = @_;
	my %options = (
		SSL_server    => 1,
		SSL_cert_file => $tls->{cert},
		SSL_key_file  => $tls->{key});
	$options{SSL_version} = $tls->{version} if $tls->{version};
	$options{SSL_cipher_list} = $tls->{ciphers} if $tls->{ciphers};
	if ($tls->{client_ca})
	{
		$options{SSL_verify_mode} = SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT;
		$options{SSL_ca_file} = $tls->{client_ca};
	}
	return SmReceiver::Tls->start_SSL($connection, %options);
}

1;
